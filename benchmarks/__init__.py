"""Side-by-side measurements; run as modules, never imported by the product.

Source: ``benchmarks/results/README.md``.
"""
