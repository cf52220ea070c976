"""What a rank does to itself, called before its script runs (see server.py). Nothing here runs in a rank without a fault."""
