"""How pages and figures look and are written, whatever they show."""
