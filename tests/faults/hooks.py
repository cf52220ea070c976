"""What a rank does to itself, called before its script runs (see fork_server.py). Nothing here runs in a rank without a fault."""
