"""``qdeploy report``: one HTML file that shows what was made, how good it is and how fast."""
