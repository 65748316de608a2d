"""Placement by measurement: which quantizers of a graph an engine keeps, decided from times and errors.

A graph comes with all the quantizers that were calibrated. Where a processor gains nothing from one of them, or
where its error is more than its speed is worth, the layers behind it are computed in 16 bits instead.
"""
