"""Pure tensor maths. Nothing here imports diffusers or anything else of this package."""
