"""Source code: its languages, where a completion of it ends, and what of a file is sent."""
