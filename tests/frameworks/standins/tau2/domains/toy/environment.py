"""A domain of one table."""

import json
from types import SimpleNamespace


class Shop:
    user_tools = None
    to_json_str = staticmethod(lambda value: value if isinstance(value, str) else json.dumps(value))

    def __init__(self):
        self.stock = {"cup": 3}

    def get_policy(self):
        return "Sell what is asked for."

    def get_tools(self):
        parameters = {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]}
        described = {"name": "sell", "description": "Sell an item.", "parameters": parameters}
        return [SimpleNamespace(name="sell", openai_schema={"function": described})]

    def use_tool(self, name, item):
        if not self.stock[item]:
            raise ValueError("sold out")
        self.stock[item] -= 1
        return {"left": self.stock[item]}

    def set_state(self, initialization_data, initialization_actions, message_history):
        self.stock |= initialization_data

    def get_db_hash(self):
        return repr(self.stock)


def get_environment():
    return Shop()


def get_tasks():
    sell = SimpleNamespace(name="sell", arguments={"item": "cup"})
    asked = SimpleNamespace(actions=[sell], communicate_info=["1000"])
    began = SimpleNamespace(initialization_data={"plate": 1}, initialization_actions=None, message_history=None)
    return [SimpleNamespace(id="0", user_scenario="You want a cup.", evaluation_criteria=asked, initial_state=began)]
