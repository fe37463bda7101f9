"""The study of where MobileNet's accuracy goes."""
