# Hinge on VGG-16, CIFAR-10, as published: rows and columns of a matrix behind every convolution but the first;
# fine-tuned at a learning rate of 0.01, without a teacher. Penalties are means over the 12 matrices here, published are
# sums.
_base_ = ["./_base_/models/vgg16_linear3_cifar10.py", "./_base_/cifar10_300e_hinge.py"]

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(
        type="Hinge",
        target=dict(macs=0.609),
        placement="both",
        strength=2e-4,
        threshold=5e-2,
        annealing=dict(factor=2, high=400 / 12, low=200 / 12),
    ),
    scope="backbone",
    input_size=32,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]

pretrain = dict(optim_wrapper=dict(optimizer=dict(weight_decay=5e-4)))
optim_wrapper = dict(optimizer=dict(weight_decay=5e-4))
finetune = dict(optim_wrapper=dict(optimizer=dict(lr=0.01)), custom_hooks=[])
