"""The methods' authors' own code beside ours, on one model and one calibration set; nothing of it is kept here."""
