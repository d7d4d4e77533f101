"""Offline: conversations and pictures, checked once and written as the folder that training reads."""
