"""The HTML report: numbers of the runs, words about them, charts, one page that opens offline."""
