"""Results as drawings: `python -m benchmarks.charts RESULTS.json DIRECTORY`. It needs matplotlib, of the extra bench.

The drawings stand on white pages and on black ones: nothing behind them, and middle tones that both bear. The same
results give the same bytes.
"""
