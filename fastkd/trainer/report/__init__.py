"""The HTML report about training runs: their records read, their curves drawn, the page rendered."""
