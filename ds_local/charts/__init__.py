"""Pictures without a plotting library: SVG for pages and docs, one style, light and dark."""
