"""The tables of the paper: what stands in them, the runs behind them and the report."""
