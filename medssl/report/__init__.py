"""One self-contained HTML file: text, tables and embedded pictures."""
