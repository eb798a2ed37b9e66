"""What the command line does: each module is one command, or what several commands share."""
