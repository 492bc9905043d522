"""TransNormerLLM in torchtitan 0.2.2: its trainer, data, optimizers and checkpoints, our models.

Importing this registers the train spec ``transnormer``, whose flavors are the published sizes::

    torchrun --nproc-per-node 8 -m torchtitan.train --model.name transnormer --model.flavor tnl-1b \\
        --experimental.custom_import transnormer.integrations.torchtitan ...

torchtitan is not installed with this package: ``pip install torchtitan==0.2.2``.
"""

from torchtitan.protocols.train_spec import register_train_spec

from transnormer.integrations.torchtitan.spec import train_spec

NAME = "transnormer"

register_train_spec(NAME, train_spec())
