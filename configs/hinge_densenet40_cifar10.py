# Hinge on DenseNet-40, CIFAR-10, as published: rows of a matrix behind every convolution but the first, those of the
# transitions too; Nesterov momentum; fine-tuned at a learning rate of 0.01. Penalties are means over the 38 matrices
# here, published are sums.
_base_ = ["./_base_/models/densenet40_cifar10.py", "./_base_/cifar10_300e_hinge.py"]

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(
        type="Hinge",
        target=dict(macs=0.5522),
        placement="rows",
        pair_pointwise=True,
        strength=2e-4,
        threshold=1e-3,
        annealing=dict(factor=2, high=10 / 38, low=5 / 38),
    ),
    scope="backbone",
    input_size=32,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]

pretrain = dict(optim_wrapper=dict(optimizer=dict(nesterov=True)))
optim_wrapper = dict(optimizer=dict(nesterov=True))
finetune = dict(optim_wrapper=dict(optimizer=dict(lr=0.01)))
