"""Records as people read them: tables, pictures, and one HTML page."""
