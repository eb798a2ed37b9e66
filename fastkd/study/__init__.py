"""Studies: grids of runs that reproduce a table or a figure, resumed where they stopped. See ``fastkd.study.grid``."""
