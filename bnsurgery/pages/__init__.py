"""The look of pages and figures, and how they are written, whatever they show."""
