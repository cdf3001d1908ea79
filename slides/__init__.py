"""Files of slides, to spots and pixels."""
