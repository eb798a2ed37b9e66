"""What the command line does with a finished or planned run."""
