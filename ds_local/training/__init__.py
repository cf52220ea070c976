"""The loop around the engine, and what it shows: profiles, diagnostics, pictures."""
