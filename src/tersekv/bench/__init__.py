"""Speed. Every module checks first that what it times computes the right thing, then times all of it in turn."""
