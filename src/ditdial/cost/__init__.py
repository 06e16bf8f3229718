"""What a forward pass multiplies, in closed form.

The multiply-adds of a mode follow from the shapes of a model alone: which tokens go through which
layers of its blocks, and what a mode leaves out of them. A closed form costs nothing to evaluate,
so that a run can be planned before it is made; it is checked against torch's own counter.
"""
