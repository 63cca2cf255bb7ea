# MobileNet V1 of gumi and 1xN.
custom_imports = dict(imports=["prune_mm"], allow_failed_imports=False)

model = dict(
    type="ImageClassifier",
    backbone=dict(type="prune_mm.MobileNetV1"),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead", num_classes=1000, in_channels=1024, loss=dict(type="CrossEntropyLoss"), topk=(1, 5)
    ),
)
