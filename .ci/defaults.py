"""For the site: the default of a field is what `validated_field` is given, not the call."""

import griffe


class Defaults(griffe.Extension):
    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs) -> None:
        call = attr.value
        if isinstance(call, griffe.ExprCall) and str(call.function) == "validated_field":
            named = {part.name: part.value for part in call.arguments if isinstance(part, griffe.ExprKeyword)}
            attr.value = named.get("default")
