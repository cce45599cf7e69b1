"""Side-by-side measurements, run as modules and never imported by the product.

Source: ``benchmarks/results/README.md``.
"""
