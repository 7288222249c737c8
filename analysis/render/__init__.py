"""A table in each format, all from the same cells: `Table.to_markdown`, `to_latex`, `to_html`, `to_csv`, `to_rich`."""
