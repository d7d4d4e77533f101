"""Looking at things: tables, pages and plots."""
