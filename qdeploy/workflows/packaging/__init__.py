"""Folders that model servers of others load as they are: configuration, engine and an adapter for each server."""
