# Random channels, the same share everywhere; trained like UniformL1.
_base_ = "./uniform.py"

model = dict(pruner=dict(type="RandomChannels"))
