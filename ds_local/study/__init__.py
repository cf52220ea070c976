"""The quality study: methods on equal tokens and the same data order, one table."""
