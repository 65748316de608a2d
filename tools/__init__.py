"""What made the things that the package ships."""
