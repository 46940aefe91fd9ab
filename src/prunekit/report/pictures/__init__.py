"""Charts, as SVG for pages and as PNG files."""
