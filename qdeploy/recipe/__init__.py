"""Recipes and their vocabulary: formats, targets, coverages, efforts, stages."""
