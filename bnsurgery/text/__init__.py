"""Values to text and back: numbers, tables for the terminal, and untrusted JSON."""
