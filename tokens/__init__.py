"""What one takes away: a class token, its file, and the same for other tools."""
