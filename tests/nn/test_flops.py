"""Products of traced programs are counted with what repeats them."""

import jax
import jax.numpy as jnp

from vlmlora.nn.flops import Products, products_of


def test_products_are_counted_where_they_run():
    def program(x, count):
        x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ jnp.ones((8, 8))), None), x, length=5)
        total = jax.lax.fori_loop(0, count, lambda _, total: total + (x @ jnp.ones((8, 3))).sum(), 0.0)
        return jax.lax.cond(count > 2, lambda: (x @ jnp.ones((8, 2))).sum(), lambda: total)

    jaxpr = jax.make_jaxpr(program)(jnp.ones((4, 8)), 3).jaxpr
    scanned, in_while, in_branch = 5 * (2 * 4 * 8 * 8), 2 * 4 * 8 * 3, 2 * 4 * 8 * 2
    assert products_of(jaxpr) == Products(scanned + in_while + in_branch, 4 * 8, 4 * 3)
