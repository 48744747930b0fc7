"""Source code: its languages, where a completion ends, and which parts of a file are sent."""
