"""What we know of the libraries around us: diffusers, accelerate and peft.

How a pipeline tells whether it guides and at which levels it calls its transformer, what a
scheduler's predictions mean, where weights are when they are offloaded or quantised, what step
caches keep, how changed classes are pickled. What is known here of other people's code may change
with their next version.
"""
