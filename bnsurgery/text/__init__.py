"""Values as text, and back: tables for the terminal, and JSON, of which nothing is believed."""
