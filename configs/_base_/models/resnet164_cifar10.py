# ResNet-164 of Hinge: bottlenecks, 1x1 convolution and batch norm as projections.
custom_imports = dict(imports=["prune_mm"], allow_failed_imports=False)

model = dict(
    type="ImageClassifier",
    backbone=dict(type="prune_mm.CIFARResNet", depth=164, block="bottleneck"),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=10, in_channels=256, loss=dict(type="CrossEntropyLoss")),
)
