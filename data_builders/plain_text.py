"""Plain texts that have nothing to do with any training question, written for this project (Apache-2.0 like the code).

Their likelihood before and after tuning shows what a method does to everything it was not asked to change.
"""

PARAGRAPHS = tuple(
    " ".join(part.split())
    for part in """
A kettle warms water from below. The heated layer expands, becomes lighter than the water above it, and rises, while
cooler water sinks to take its place. This slow circulation carries warmth through the whole vessel until small
bubbles form on the metal and break away.

Bread dough rises because yeast feeds on sugars in the flour and gives off gas. The gas is trapped in a stretchy net
of gluten. When the loaf goes into the oven the bubbles grow once more, the starch sets, and the crust turns brown.

The ferry left the harbour shortly after six. Two cyclists stood at the rail and watched the lights of the town grow
smaller. By the time the coffee was ready the island had disappeared behind the rain, and nobody spoke for a while.

A bicycle chain should be cleaned every few hundred kilometres. Wipe it with a dry rag, put one drop of oil on each
link, turn the pedals backwards for a minute, and wipe again. Oil that stays on the outside only collects dust.

Rivers carry sand and gravel from the hills to the sea. Where the current slows, the heaviest grains settle first and
the finest last. Over centuries these deposits build wide plains, and the river itself wanders across them in loops.

The library opens at nine on weekdays and at ten on Saturdays. Books may be kept for four weeks and renewed twice
unless another reader has asked for them. The reading room on the second floor has desks, lamps and a view of the
park.

My grandmother kept her recipes in a biscuit tin. Most of them were written on the backs of envelopes, without
amounts, because she cooked by eye. When she moved to the city she gave the tin to my brother, who measures
everything.

Owls hunt at night mainly by hearing. In many species one ear sits slightly higher than the other, so a sound from
below arrives at the two ears at different times. From that difference the bird can tell the height of a mouse in the
grass.

To plant a young tree, dig a hole twice as wide as the roots and no deeper than they are tall. Loosen the soil at the
sides, set the tree upright, fill the hole, and press the earth down gently. Water it well in the first two summers.

The committee met on Tuesday to discuss the new playground. Three designs had been submitted. The cheapest one had no
shade, and the most popular one needed a fence along the road, so the decision was put off until the next meeting.

Glass is made by melting sand with soda and lime. At high temperature the mixture flows like honey and can be blown,
pressed or drawn into sheets. It must then cool slowly, or stresses inside it will make it crack days later.

The train climbs for an hour before it reaches the pass. There are seven tunnels and a long viaduct of grey stone. In
winter the guard walks through the carriages and tells visitors on which side to sit for the best view of the lake.

A sundial shows the hour by the position of a shadow. Its pointer is set parallel to the axis of the earth. Because
the sun does not cross the sky at an even pace through the year, the dial runs up to a quarter of an hour fast or
slow.

Salt was once so valuable that towns grew rich from a single spring of brine. Workers boiled the water in flat pans,
raked the crystals into baskets, and loaded them onto boats. The forests around the town were cut down to feed the
fires.

She tuned the piano twice a year, in spring and in autumn, when the heating was switched on or off. First she set one
octave in the middle by ear, then she worked outwards, string by string, listening for the beats to slow and stop.

Cheese begins with milk that has been made to curdle. The solid curd is cut, drained, salted and pressed. What
happens next depends on time, moisture and the moulds that live in the cellar, which is why neighbours make such
different kinds.

The lighthouse stands on a rock that is covered at high tide. Keepers used to stay for a month at a time, and when
the sea was rough they had to wait longer. Since the lamp became automatic, a boat visits only for repairs.

A good photograph of a landscape often needs something close to the camera: a stone, a gate, a branch. It gives the
eye a place to start and makes the distance visible. Early morning helps as well, because the shadows are long.

Bees tell one another where flowers are by dancing on the comb. The angle of the dance shows the direction from the
sun, and its length shows how far to fly. Other bees follow in the dark with their antennae and then leave the hive.

The old map showed a road that nobody could find. It ran from the mill to the chapel in a straight line, across what
is now a pond. A surveyor finally explained that the pond had been dug by hand in a dry year, to keep fish.

Concrete hardens through a chemical reaction between cement and water and not by drying. For this reason builders
keep fresh concrete wet for several days. A slab that dries too quickly in the sun stays weak at the surface.

On market days the square filled before sunrise. Farmers unloaded crates of cabbages and sacks of potatoes, and the
woman who sold eggs set out her scales. By noon the stalls were gone and the street sweepers had the place to
themselves.

A parachute slows a fall by pushing against the air. The faster it moves, the greater the drag becomes, until drag
and weight are equal. From then on the speed no longer changes, and the jumper drifts down at a steady rate.

Wool keeps its warmth when it is wet because the fibres are crimped and hold small pockets of air. After washing, a
jumper should be rolled in a towel and dried flat. If it is hung on a line, the weight of the water stretches it.

The orchestra rehearsed the slow movement three times. The conductor wanted the second violins softer and the oboe a
little later. On the third attempt nobody played a wrong note, yet everyone agreed that the first had been better.

Coral reefs are built by small animals that live in colonies and make skeletons of lime. When a colony dies, others
grow on top of it. In this way a reef may rise by about a centimetre each year and outlive every creature that made
it.

To fold a letter in three, lay it flat, bring the lower third up, and press the crease with a fingernail. Then fold
the top down to the new edge. Turn it so that the address can be read through the window of the envelope.

The museum keeps its paintings at the same temperature all year. Wooden panels swell in damp air and shrink in dry
air, and the paint on them cannot follow. A difference that a visitor would not notice can open cracks within a
season.

He learned to swim in a lake at the age of forty. The water was cold, and he could not see the bottom. His daughter
stood on the jetty and counted his strokes aloud, and on the last day of the holiday she reached one hundred.

Clouds form where moist air rises and cools. Vapour condenses on dust and sea salt, and each droplet is so small that
it takes about a million of them to make one drop of rain. Until they join, they float on the rising air.

The carpenter chose oak for the table and ash for the chairs. Oak is heavy and hard to dent, which suits a surface
that will be worked on. Ash bends without breaking, so the backs of the chairs could be thin and still take a
person's weight.

A chess clock has two faces and two buttons. Each player presses a button after moving, which stops one clock and
starts the other. The first clocks of this kind used sand, and players had to remember to turn them over.

The path along the cliff was closed after the storm. Part of the fence had fallen onto the beach, and in two places
the edge was only a step away from the track. Walkers were asked to use the lane through the village until June.

Paper can be made from almost any plant. The stems are boiled, beaten to pulp and stirred into water. A fine sieve
lifts a thin layer of fibres from the vat, and when the water has run off they hold together without any glue.

The bakery on the corner sells out before eight in the morning. The owner says that she could bake more, but then she
would have to start at two instead of three. Her customers have learned to order the evening before.

A compass needle lines up with the magnetic field of the earth, which is not quite the direction of the geographic
pole. Navigators correct for the difference. It changes from place to place and drifts slowly, so charts print it
with a year.

The village school had eleven pupils and one teacher. The older children helped the younger ones with reading, and in
the afternoons everyone went outside. When the bridge was washed away in March, lessons were held in the inn.

Tea, coffee and cocoa all reached the ports of the north within a few decades. They were sold as medicine at first.
Soon there were houses in which people drank them, read newspapers, argued about prices and insured ships.

An elevator is balanced by a counterweight that moves down when the cabin goes up. The motor lifts only the
difference between the two. Several steel cables share the load, and each of them alone would be strong enough to
carry it.

Frost came early that year and caught the last of the tomatoes. We picked the green ones, wrapped them in newspaper
and put them in a drawer. By the middle of December they had all turned red, and we ate them with bread and salt.
""".strip().split("\n\n")
)
