"""What a sweep says: its runs read back, compared, drawn and put on a page."""
