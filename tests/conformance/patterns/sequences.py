"""Recurrent networks and attention."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.conformance.patterns import MIXES, N, Parts, Setup, T, of_rows, pattern, rows, tokens


def recurrent(net: nn.Module) -> Setup:
    return Setup(Parts(rnn=net), rows(T, 3), of_rows(lambda m, x: m.rnn(x)[0]))


@pattern()
def lstm():
    return recurrent(nn.LSTM(3, 4, batch_first=True))


@pattern()
def lstm_with_projections():
    return recurrent(nn.LSTM(3, 4, proj_size=2, batch_first=True))


@pattern()
def gru_of_two_layers():
    return recurrent(nn.GRU(3, 4, num_layers=2, batch_first=True))


@pattern()
def bidirectional_lstm():
    return recurrent(nn.LSTM(3, 4, bidirectional=True, batch_first=True))


@pattern()
def bidirectional_gru_time_first():
    net = Parts(rnn=nn.GRU(3, 4, bidirectional=True))
    return Setup(net, rows(T, 3), of_rows(lambda m, x: m.rnn(x.transpose(0, 1))[0].transpose(0, 1)))


@pattern()
def lstm_with_a_learned_start():
    net = Parts(rnn=nn.LSTM(3, 4, batch_first=True), start=nn.Parameter(torch.randn(2, 1, 1, 4)))

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        hidden, cell = net.start.expand(-1, -1, len(x), -1).contiguous()
        return net.rnn(x, (hidden, cell))[0]

    return Setup(net, rows(T, 3), of_rows(forward))


@pattern()
def lstm_cell_in_a_loop():
    net = Parts(cell=nn.LSTMCell(3, 4), head=nn.Linear(4, 2))

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        state = None
        for position in range(x.shape[1]):
            state = net.cell(x[:, position], state)
        return net.head(state[0])

    return Setup(net, rows(T, 3), of_rows(forward))


@pattern()
def packed_sequences():
    net = Parts(rnn=nn.GRU(3, 4, batch_first=True), head=nn.Linear(4, 2))

    def forward(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, lengths = batch
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return net.head(net.rnn(packed)[1][-1])

    return Setup(net, (rows(T, 3), torch.tensor([5, 2, 3, 5, 1, 4], device="cpu")), of_rows(forward))


@pattern()
def head_on_packed_positions():
    net = Parts(embed=nn.Linear(3, 3), rnn=nn.GRU(3, 4, batch_first=True), head=nn.Linear(4, 2))

    def forward(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, lengths = batch
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        packed = packed._replace(data=net.embed(packed.data))
        out, _ = net.rnn(packed)
        out = out._replace(data=net.head(out.data))
        return pad_packed_sequence(out, batch_first=True, total_length=T)[0]

    return Setup(net, (rows(T, 3), torch.tensor([5, 2, 3, 5, 1, 4], device="cpu")), of_rows(forward))


@pattern()
def attention():
    net = Parts(attend=nn.MultiheadAttention(4, 2, batch_first=True))
    return Setup(net, rows(T, 4), of_rows(lambda m, x: m.attend(x, x, x)[0]))


@pattern()
def attention_time_first():
    net = Parts(attend=nn.MultiheadAttention(4, 2))

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return net.attend(x, x, x)[0].transpose(0, 1)

    return Setup(net, rows(T, 4), of_rows(forward))


@pattern()
def attention_under_a_causal_mask():
    net = Parts(attend=nn.MultiheadAttention(4, 2, batch_first=True))

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return net.attend(x, x, x, attn_mask=mask, is_causal=True)[0]

    return Setup(net, rows(T, 4), of_rows(forward))


@pattern()
def attention_under_a_padding_mask():
    net = Parts(attend=nn.MultiheadAttention(4, 2, batch_first=True))
    lengths = torch.tensor([5, 2, 3, 5, 1, 4])

    def forward(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, lengths = batch
        padding = torch.arange(T) >= lengths[:, None]
        return net.attend(x, x, x, key_padding_mask=padding, need_weights=False)[0]

    return Setup(net, (rows(T, 4), lengths), of_rows(forward))


@pattern()
def attention_between_different_widths():
    net = Parts(attend=nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True, add_bias_kv=True))
    return Setup(net, (rows(2, 4), rows(T, 3), rows(T, 5)), of_rows(lambda m, b: m.attend(*b)[0]))


@pattern(refused=MIXES)
def attention_between_the_examples():
    net = Parts(attend=nn.MultiheadAttention(4, 2))
    return Setup(net, rows(4), of_rows(lambda m, x: m.attend(x, x, x)[0]))


def encoder_layer(**options: object) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, **options)


@pattern()
def encoder_layer_norm_last():
    return Setup(Parts(body=encoder_layer()), rows(T, 4), of_rows(lambda m, x: m.body(x)))


@pattern()
def encoder_layer_norm_first():
    return Setup(Parts(body=encoder_layer(norm_first=True)), rows(T, 4), of_rows(lambda m, x: m.body(x)))


@pattern()
def encoder_in_eval():
    body = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False).eval()
    return Setup(Parts(body=body), rows(T, 4), of_rows(lambda m, x: m.body(x)))


@pattern()
def encoder_without_biases():
    return Setup(Parts(body=encoder_layer(bias=False)), rows(T, 4), of_rows(lambda m, x: m.body(x)))


@pattern()
def decoder_over_a_memory():
    layer = nn.TransformerDecoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    body = nn.TransformerDecoder(layer, 2)
    return Setup(Parts(body=body), (rows(3, 4), rows(T, 4)), of_rows(lambda m, b: m.body(*b)))


@pattern()
def small_language_model():
    """Tied table and head, learned positions, causal attention, a loss over tokens of equal number."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4)
            self.position = nn.Embedding(T, 4)
            self.body = encoder_layer(norm_first=True)
            self.head = nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.embed(x) + self.position(torch.arange(x.shape[1]))
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=hidden.dtype)
            return self.head(self.body(hidden, src_mask=mask, is_causal=True))

    def loss(net: nn.Module, batch: Tensor) -> Tensor:
        logits = net(batch[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    return Setup(Model(), tokens(9, T + 1), loss)


@pattern()
def scaled_dot_product_attention():
    net = Parts(qkv=nn.Linear(4, 12), out=nn.Linear(4, 4))

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        q, k, v = net.qkv(x).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return net.out(mixed.transpose(1, 2).flatten(2))

    return Setup(net, rows(T, 4), of_rows(forward))


@pattern()
def nested_tensors_inside():
    # Ragged rows of all examples one after the other: as many for each as its length says.
    net = Parts(layer=nn.Linear(3, 4), head=nn.Linear(4, 2))

    def forward(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, lengths = batch
        kept = torch.arange(T) < lengths[:, None]
        ragged = net.layer(x[kept]).tanh()
        owner = torch.arange(len(x)).repeat_interleave(lengths)
        return net.head(torch.zeros(len(x), 4, dtype=x.dtype).index_add(0, owner, ragged))

    return Setup(net, (rows(T, 3), torch.tensor([5, 2, 3, 5, 1, 4])), of_rows(forward))


@pattern()
def messages_between_nodes_of_each_graph():
    # Dense graphs: an adjacency matrix for each example.
    net = Parts(layer=nn.Linear(3, 4), head=nn.Linear(4, 2))
    adjacency = (torch.rand(N, T, T) < 0.5).to(torch.get_default_dtype())
    return Setup(net, (rows(T, 3), adjacency), of_rows(lambda m, b: m.head((b[1] @ m.layer(b[0])).relu()).sum(1)))
