"""Published models and what they cost, without their weights.

Configs of well-known models by name, built on the meta device, so that ``ditdial cost`` and
``ditdial probe`` can say what a mode would cost before anything is downloaded; and the numbers that
papers report, counted the way they count.
"""
