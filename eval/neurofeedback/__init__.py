"""Neurofeedback (arXiv 2505.13763): can a model tell, and steer, what goes on inside it, from labelled examples alone?

`axes` finds directions of hidden states, whose sign labels sentences; `reporting` asks for the labels of sentences one
by one, behind those of others; `baselines` does the same without looking inside, without which an accuracy means
nothing; `control` asks for sentences of a label; `outcomes` puts numbers and intervals to both. `python -m
steerbook.eval.neurofeedback` runs it all on any two models and a file of sentences.
"""
