"""Networks of the published methods that OpenMMLab lacks, as backbones for ``mmpretrain.ImageClassifier``.

All return a tuple of feature maps and end where the classifier's global average pooling starts.
"""

from prune_mm.backbones.densenet import CIFARDenseNet
from prune_mm.backbones.mobilenet_v1 import MobileNetV1
from prune_mm.backbones.preresnet import PreResNet, WideResNet
from prune_mm.backbones.resnet import CIFARResNet
from prune_mm.backbones.resnext import CIFARResNeXt
from prune_mm.backbones.vgg import CIFARVGG

__all__ = ["CIFARVGG", "CIFARDenseNet", "CIFARResNeXt", "CIFARResNet", "MobileNetV1", "PreResNet", "WideResNet"]
