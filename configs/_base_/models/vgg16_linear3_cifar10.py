# VGG-16 of Hinge: three linear layers, with nothing that costs anything between them.
_base_ = "./vgg16_cifar10.py"

model = dict(
    head=dict(
        type="StackedLinearClsHead",
        mid_channels=[512, 512],
        act_cfg=None,
        init_cfg=dict(type="Kaiming", layer="Linear", mode="fan_in", nonlinearity="linear"),
    )
)
