"""Text to token ids and back, with control ids that data cannot forge."""
